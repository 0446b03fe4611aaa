"""What is drawn, and the numbers behind it."""
