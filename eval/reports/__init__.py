"""Reports: results in words, tables, Markdown, JSON and one HTML file."""
