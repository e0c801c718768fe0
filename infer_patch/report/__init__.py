"""Results for people: tables for the terminal, and one HTML page."""
