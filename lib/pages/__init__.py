"""What is looked at: executed notebooks and the report."""
