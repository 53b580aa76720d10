"""A page with settings, results, analysis and pictures of training runs."""
