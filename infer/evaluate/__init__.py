"""One ruler for all methods: protocols (what is asked), methods (who answers), metrics, a restartable run, a report."""
