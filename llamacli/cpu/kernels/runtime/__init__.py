"""What runs compiled programs: the thread pool, and the guard against mapped files that are cut."""
