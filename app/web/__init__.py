"""The web application: the page (Gradio), the HTTP routes (FastAPI) and what they share."""
