"""The models on this machine and their download: finds the file that a name stands for, fetches files from a hub."""
