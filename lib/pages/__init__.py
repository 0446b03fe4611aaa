"""What is looked at: executed notebooks, the report and the explorer."""
