"""The model: open_clip's image towers, cut in two, how they are loaded, and the classes that images go into."""
