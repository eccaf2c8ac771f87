"""What is said: workers' output, the launcher's own lines, and how the job went, in all the forms people read it in."""
