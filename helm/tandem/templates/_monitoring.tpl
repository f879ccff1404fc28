{{- /* An endpoint to scrape; (list $ port). Both services require the bearer token for /metrics. */}}
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
