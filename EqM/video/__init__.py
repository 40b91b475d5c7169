"""Videos on disk: the frames of a file, what a folder holds, the stream of clips, its loader, what is written."""
