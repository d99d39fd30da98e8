"""The evidence: tasks that run offline, what is asked of them, and the script that asks it (`make evidence`)."""
