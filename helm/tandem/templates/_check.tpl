{{- /* Annotations of the objects that helm creates before an upgrade, and deletes if it succeeds; the order. */}}
{{- define "tandem.upgradeHook" -}}
helm.sh/hook: pre-upgrade
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}

{{- /* The spec of a Job in which one service reads the configuration; (list $ service). */}}
{{- define "tandem.checkJob" -}}
{{- $ := index . 0 }}{{ $service := index . 1 }}{{ $options := get $.Values $service -}}
backoffLimit: 2
activeDeadlineSeconds: 3600
ttlSecondsAfterFinished: 3600
podFailurePolicy:
  rules:
    - action: FailJob  # a mistake in config.yaml; helm prints the log
      onExitCodes: {operator: In, values: [2]}
template:
  metadata:
    labels: {{- include "tandem.selector" (list $ "check") | nindent 6 }}
  spec:
    restartPolicy: Never
    {{- $where := pick $options "tolerations" "nodeSelector" "schedulerName" "runtimeClassName" }}
    {{- omit (include "tandem.podOptions" (list $ $where) | fromYaml) "serviceAccountName" "affinity" | toYaml | nindent 4 }}
    containers:
      - name: check
        image: {{ include "tandem.image" $options.image }}
        imagePullPolicy: {{ $options.image.pullPolicy }}
        command: [tini, -g, --, python3, -m, {{ printf "tandem_%s" $service }}, --config, /config/config.yaml, --check]
        env:
          {{- if eq $service "generator" }}{{ with include "tandem.parallel" $ }}
          {{- . | nindent 10 }}
          {{- end }}{{ end }}
          {{- with include "tandem.extraEnv" $options }}
          {{- . | nindent 10 }}
          {{- end }}
        resources:
          requests: {cpu: 50m, memory: 256Mi, ephemeral-storage: 64Mi}
          limits: {cpu: "1", memory: 1Gi, ephemeral-storage: 256Mi}
        {{- include "tandem.securityContext" $ | nindent 8 }}
        volumeMounts:
          - {name: config, mountPath: /config, readOnly: true}
          - {name: tmp, mountPath: /tmp}
    volumes:
      - name: config
        configMap: {name: {{ include "tandem.fullname" $ }}-check}
      - name: tmp
        emptyDir: {sizeLimit: 64Mi}
{{- end }}
