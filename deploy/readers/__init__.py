"""Reading what a run leaves in its folder, while it goes on or after it: nothing here writes, asks or draws."""
