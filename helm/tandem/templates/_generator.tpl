{{- /* A generator's pod: that of the StatefulSet, or of the LeaderWorkerSet's (dict "root" $ "component" … "args" …). */}}
{{- define "tandem.generatorPod" -}}
{{- $ := .root }}{{ $options := $.Values.generator -}}
metadata:
  labels:
    {{- include "tandem.selector" (list $ .component) | nindent 4 }}
    tandem/generator-config: {{ include "tandem.generatorHash" $ | quote }}
spec:
  {{- include "tandem.podOptions" (list $ $options) | nindent 2 }}
  terminationGracePeriodSeconds: {{ add 15 (include "tandem.generatorSeconds" (list $ "shutdown_timeout_s" 30)) }}
  initContainers:
    - name: project  # waits for it, and makes the folder of leases, which the generator itself may not
      image: {{ include "tandem.image" $options.image }}
      imagePullPolicy: {{ $options.image.pullPolicy }}
      command:
        - sh
        - -ec
        - |
          mkdir -p /weights/served
          {{- include "tandem.waitForProject" $ | nindent 10 }}
      env: {{- include "tandem.projectEnv" $ | nindent 8 }}
      {{- include "tandem.smallResources" $ | nindent 6 }}
      {{- include "tandem.securityContext" $ | nindent 6 }}
      volumeMounts:
        - {name: cache, mountPath: /cache, readOnly: true}
        - {name: weights, mountPath: /weights}
  containers:
    - name: generator
      image: {{ include "tandem.image" $options.image }}
      imagePullPolicy: {{ $options.image.pullPolicy }}
      args: {{- concat (list "--config" "/cache/project/config.yaml") .args | toYaml | nindent 8 }}
      env:
        {{- include "tandem.serviceEnv" $ | nindent 8 }}
        - name: HF_HUB_OFFLINE  # the trainer's pod has fetched what is needed
          value: "1"
        {{- with include "tandem.parallel" $ }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- range $name, $value := $options.env }}
        - name: {{ $name }}
          value: {{ $value | quote }}
        {{- end }}
      {{- if eq .component "generator" }}
      ports:
        - {name: http, containerPort: 8000}
      startupProbe:
        httpGet: {path: /healthz, port: http}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: {{ max 1 (div $options.startupBudgetSeconds 5) }}
      readinessProbe:
        httpGet: {path: /readyz, port: http}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 2
      livenessProbe:  # for a process that hangs; longer than a weight switch may hold it up
        httpGet: {path: /healthz, port: http}
        periodSeconds: 10
        timeoutSeconds: 10
        failureThreshold: {{ add 6 (div (include "tandem.generatorSeconds" (list $ "switch_timeout_s" 300)) 10) }}
      lifecycle:
        preStop:  # until the Service's addresses have forgotten this one
          exec: {command: [sleep, "5"]}
      {{- end }}
      resources: {{- include "tandem.resources" $options | nindent 8 }}
      {{- include "tandem.securityContext" $ | nindent 6 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        - {name: token, mountPath: /secrets, readOnly: true}
        - {name: cache, mountPath: /cache, readOnly: true}
        - {name: weights, mountPath: /weights, readOnly: true}
        - {name: weights, mountPath: /leases, subPath: served}
  volumes: {{- include "tandem.volumes" (list $ $options) | nindent 4 }}
{{- end }}

{{- /* How many parts the tensor parallel size is one of: a replica's devices / (data parallel × pipeline parallel). */}}
{{- define "tandem.tensorGroups" -}}
{{- $config := include "tandem.config" . | fromYaml }}
{{- mul .Values.generator.dataParallelSize (dig "generator" "vllm" "pipeline_parallel_size" 1 $config) }}
{{- end }}

{{- /* Tensor and data parallel sizes that use exactly the replica's accelerators. */}}
{{- define "tandem.parallel" -}}
{{- $groups := include "tandem.tensorGroups" . }}
{{- with .Values.generator }}{{ if .accelerator.count -}}
- name: TANDEM__GENERATOR__TENSOR_PARALLEL_SIZE
  value: {{ div (mul .accelerator.count .nodesPerReplica) $groups | quote }}
- name: TANDEM__GENERATOR__DATA_PARALLEL_SIZE
  value: {{ .dataParallelSize | quote }}
{{- end }}{{ end }}
{{- end }}
