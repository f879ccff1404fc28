{{- /* Egress to the cluster's DNS, on a node too that caches it. */}}
{{- define "tandem.toDns" -}}
- ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
  to:
    - namespaceSelector: {}
    - ipBlock: {cidr: 169.254.20.10/32}
{{- end }}

{{- /* A list item that selects pods of this release; (list $ component). */}}
{{- define "tandem.peer" -}}
- podSelector:
    matchLabels: {{- include "tandem.selector" . | nindent 6 }}
{{- end }}

{{- define "tandem.monitoringPeer" -}}
- namespaceSelector:
    matchLabels: {kubernetes.io/metadata.name: {{ .Values.networkPolicy.monitoringNamespace }}}
{{- end }}
