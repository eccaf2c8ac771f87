"""What the leader does: who takes part, whose commands are carried out, and who has gone silent."""
