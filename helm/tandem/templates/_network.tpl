{{- /* Egress to DNS: to the cluster's DNS pods, and to NodeLocal DNSCache, which listens on 169.254.20.10. */}}
{{- define "tandem.toDns" -}}
- ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
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
