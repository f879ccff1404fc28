{{- /* How to scrape a port; (list $ port). Both services want their own bearer token. */}}
{{- define "tandem.endpoint" -}}
{{- $ := index . 0 -}}
- port: {{ index . 1 }}
  path: /metrics
  interval: {{ $.Values.monitoring.scrape.intervalSeconds }}s
  authorization:
    credentials:
      name: {{ include "tandem.tokenSecret" $ }}
      key: {{ $.Values.token.key }}
{{- end }}
