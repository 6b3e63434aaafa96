"""The schemas of OpenAI and of others beside it, for batch lines and the server: from a request's body to what is asked
of a model, and from outputs to an answer's body and the chunks of a stream.

Format: https://platform.openai.com/docs/api-reference, and what the files say; fields that vLLM has beside it are there
as far as SamplingParams has them. What is not known is refused by name.
"""
