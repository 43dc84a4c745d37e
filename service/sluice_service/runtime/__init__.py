"""How this process behaves: its clock, its turns on the event loop, its memory."""
