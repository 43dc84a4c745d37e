"""The wire and the contract of Sluice: generated from the .proto files beside this one."""
