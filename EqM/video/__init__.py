"""Videos on disk: the frames of a file, the index of a folder, clips, loader, writers."""
