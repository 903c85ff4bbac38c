"""What is trained, on what, and the folder that a training leaves."""
