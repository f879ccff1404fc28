{{- /* Egress to DNS: to the cluster's DNS pods, and to NodeLocal DNSCache, which listens on 169.254.20.10. */}}
{{- define "tandem.toDns" -}}
- ports:
    {{- range .Values.networkPolicy.dnsPorts }}
    - {port: {{ . }}, protocol: UDP}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
  to:
    - namespaceSelector: {}
    - ipBlock: {cidr: 169.254.20.10/32}
{{- end }}

{{- /* A peer of a network policy: this release's pods of one component; (list $ component). */}}
{{- define "tandem.peer" -}}
- podSelector:
    matchLabels: {{- include "tandem.selector" . | nindent 6 }}
{{- end }}

{{- define "tandem.monitoringPeer" -}}
- namespaceSelector:
    matchLabels: {kubernetes.io/metadata.name: {{ .Values.networkPolicy.monitoringNamespace }}}
{{- end }}

{{- /* All addresses of one family except those of networkPolicy.outsideExcept; (list $ cidr separator-of-its-numbers). */}}
{{- define "tandem.outside" -}}
{{- $except := list }}
{{- range $cidr := (index $ 0).Values.networkPolicy.outsideExcept }}
  {{- if eq (index $ 2) (ternary ":" "." (contains ":" $cidr)) }}{{ $except = append $except $cidr }}{{ end }}
{{- end -}}
- ipBlock:
    cidr: {{ index . 1 | quote }}
    {{- with $except }}
    except: {{- toYaml . | nindent 6 }}
    {{- end }}
{{- end }}
