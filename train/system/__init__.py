"""Helpers around the operating system: files, disks, child processes and output."""
