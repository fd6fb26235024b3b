package pods

import (
	"encoding/json"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/imdsgate/imdsgate/proxy"
)

// What users write can neither fill our memory nor panic.
func TestKeep(t *testing.T) {
	long := strings.Repeat("x", 1<<16)
	p := podOf("a", "cart", nil, annotated(proxy.AnnotationPodRole, long, "other", long, proxy.AnnotationPodExternalID, "id"))
	f := podFacts(p)
	if len(f.annotations) != 2 || len(f.annotations[proxy.AnnotationPodRole]) != maxAnnotation || f.annotations[proxy.AnnotationPodExternalID] != "id" {
		t.Errorf("kept %d annotations, %d bytes of the role", len(f.annotations), len(f.annotations[proxy.AnnotationPodRole]))
	}
	for _, end := range [][]func(*corev1.Pod){{phase(corev1.PodFailed)}, {phase(corev1.PodSucceeded)}, {terminating, ended}} {
		f := podFacts(podOf("a", "cart", nil, append(end, annotated(proxy.AnnotationPodRole, long, "typo.amazonaws.com/role", "arn:aws:iam::1:role/a"))...))
		if f.annotations != nil {
			t.Errorf("of a pod that has ended %d annotations are kept", len(f.annotations))
		}
	}
	if o := accountFacts(account("a", "other", long)); o.annotations != nil {
		t.Error("kept what nobody reads")
	}
	// One mistyped annotation is, the same one each time.
	const arn = "arn:aws:iam::123456789012:role/cart"
	for range 20 {
		o := accountFacts(account("a", "eks.amazonaws.com/role_arn", arn, "eks.amazonaws.com/rolearn", arn, "amazonaws.com/x", arn+long))
		if len(o.annotations) != 1 || o.annotations["eks.amazonaws.com/role_arn"] != arn {
			t.Fatalf("kept %v", o.annotations)
		}
	}
	if o := accountFacts(account("a", "eks.amazonaws.com/role_arn", arn, proxy.AnnotationRoleARN, arn)); len(o.annotations) != 1 {
		t.Errorf("kept %v", o.annotations)
	}
	if o := namespaceFacts(namespace("a", proxy.AnnotationPermitted, long+long)); len(o.annotations[proxy.AnnotationPermitted]) != maxNamespaceAnnotation {
		t.Error("namespace annotation is not cut")
	}
}

// Variables that keep SDKs from asking are told, those that do not are not.
func TestQuiet(t *testing.T) {
	for _, tt := range []struct {
		env  []corev1.EnvVar
		want string
	}{
		{nil, ""},
		{[]corev1.EnvVar{{Name: "AWS_REGION", Value: "eu-west-1"}, {Name: envDisabled, Value: "false"}, {Name: envKey}}, ""},
		{[]corev1.EnvVar{{Name: envDisabled, Value: "True"}}, envDisabled},
		{[]corev1.EnvVar{{Name: envKey, ValueFrom: &corev1.EnvVarSource{}}}, envKey},
		{[]corev1.EnvVar{{Name: "http_proxy", Value: "http://proxy:3128"}, {Name: "no_proxy", Value: "localhost,10.0.0.1"}}, envProxy},
		{[]corev1.EnvVar{{Name: "HTTP_PROXY", Value: "http://proxy:3128"}, {Name: "no_proxy", Value: "localhost,169.254.169.254"}}, ""},
		{[]corev1.EnvVar{{Name: "HTTP_PROXY", Value: "http://proxy:3128"}, {Name: "NO_PROXY", Value: "169.254.0.0/16"}}, ""},
		{[]corev1.EnvVar{{Name: "HTTPS_PROXY", Value: "http://proxy:3128"}}, ""},
	} {
		p := podOf("a", "cart", nil)
		p.Spec.Containers = []corev1.Container{{}, {Env: tt.env}}
		if got := podFacts(p).quiet; got != tt.want {
			t.Errorf("%v: %q, want %q", tt.env, got, tt.want)
		}
	}
}

func FuzzPodFacts(f *testing.F) {
	for _, p := range []*corev1.Pod{
		{}, podOf("a", "cart", []string{"10.0.0.1", "fe80::1%eth0", "x"}, terminating, ended, annotated(proxy.AnnotationPodRole, "arn:oops")),
	} {
		b, err := json.Marshal(p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var p corev1.Pod
		if json.Unmarshal(b, &p) != nil {
			return
		}
		facts := podFacts(&p)
		if !facts.serving() && len(facts.ips) > 0 {
			t.Errorf("%+v has IPs", facts)
		}
		for _, ip := range facts.ips {
			if !ip.IsValid() || ip.Is4In6() {
				t.Errorf("IP %v", ip)
			}
		}
	})
}
