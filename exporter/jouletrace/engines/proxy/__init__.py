"""`jouletrace proxy`: stands before an inference server, tells of its requests, and adds the energy to its answers.

A process of its own, so that nothing of it can hold up the daemon, or the daemon it. It fails open: what jouletrace
does or does not never changes whether a request is answered.
"""
