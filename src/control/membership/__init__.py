"""Who is in the job, and who leads: one agent among many as one value. No I/O at all."""
