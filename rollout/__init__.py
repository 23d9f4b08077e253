"""Many episodes at once: engines and router, scheduler, groups, trajectory store, evaluation."""
