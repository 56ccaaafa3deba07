"""What a run's load and speeds mean for where its experts are."""
