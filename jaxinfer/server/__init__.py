"""A loaded model behind HTTP: OpenAI's and Anthropic's routes, and those to operate it. Needs the extra `server`."""
