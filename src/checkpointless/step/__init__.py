"""When: where in a step this process is, what each step began with, and the rank's record that outlives the process."""
