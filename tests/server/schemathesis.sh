#!/bin/bash
# Random requests to a server that runs, by its /openapi.json: no answer may be an error of the server's own, or of a
# status, type or form that is not documented. Not run by CI; `pip install schemathesis==4.32.5` in an environment of its
# own, then: tests/server/schemathesis.sh http://127.0.0.1:8000 [CASES a route] [options of schemathesis]
set -euo pipefail
exec schemathesis run "$1/openapi.json" --max-examples "${2:-200}" --phases examples,coverage,fuzzing \
    --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method,allow_header_conformance,ignored_auth \
    --continue-on-failure --no-shrink --request-timeout 120 "${@:3}"
