"""`tandem watch`: a read-only web page of runs. It reads the files of their folders, and writes nothing."""
