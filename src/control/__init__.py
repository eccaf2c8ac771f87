"""The decisions: who is in the job, which epoch runs, who restarts, who gives state to whom.

No I/O of any kind, no clock, no thread, no process: events and the time go in, commands come out. Same
events, same commands, always. Begin with `transitions.py`.
"""
