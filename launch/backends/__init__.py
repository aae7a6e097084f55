"""One file a back end: each turns a job into files and commands, and starts nothing."""
