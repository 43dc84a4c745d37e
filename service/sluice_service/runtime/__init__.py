"""How this process behaves: its clock, its share of the event loop, its memory."""
