"""Files for Prometheus and Grafana, over what app.web.metrics serves: no code.

prometheus.yml   a scrape with the app's token, and these alerts
alerts.yml       alert rules
dashboard.json   a Grafana dashboard; import it and choose the data source
"""
