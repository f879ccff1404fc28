"""`tandem runs`: list the runs of a project, and compare some of them. It reads the files of their folders only."""
