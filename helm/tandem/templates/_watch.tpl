{{- define "tandem.watchTokenSecret" -}}
{{ default (printf "%s-watch-token" (include "tandem.fullname" .)) .Values.watch.token.existingSecret }}
{{- end }}

{{- /* The address for browsers, if it is not that of a forwarded port. */}}
{{- define "tandem.watchUrl" -}}
{{- with .Values.watch.ingress }}{{ if .enabled -}}
{{ ternary "https" "http" (not (empty .tlsSecret)) }}://{{ .host }}
{{- end }}{{ end }}
{{- end }}
