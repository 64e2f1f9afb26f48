"""Errors, files, signals, processes, memory and the command line: what every other room stands on."""
