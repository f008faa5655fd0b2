"""Launch shapes: measured by `octavo tune`, kept in files, looked up before a launch."""
