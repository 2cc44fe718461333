"""The models on this machine, and the way to more of them: names to files, a hub's files to files of our own."""
