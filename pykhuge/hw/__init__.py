"""The machine itself: bytes, and the lines of them that have gone bad."""
