"""Videos on disk: the frames of a file, the index of a folder, the stream of clips, its loader, the
writers.
"""
