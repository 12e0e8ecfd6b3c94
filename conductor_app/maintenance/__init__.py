"""What happens to executions beside the workers: the sweeper repairs, the pruner deletes."""
