"""What a person sees: terminal, contact sheets, the description that lies beside a preset."""
