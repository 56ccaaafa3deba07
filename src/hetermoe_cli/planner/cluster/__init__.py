"""Several groups that train side by side: what each holds, how they share the batch, and what they synchronise."""
