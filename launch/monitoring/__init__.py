"""What watches a run from outside: a Grafana dashboard, Prometheus rules and its configuration."""
