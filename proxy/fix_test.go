package proxy

import (
	"strings"
	"testing"
)

// Each refusal says what to do about it, where it can be done.
func TestFixes(t *testing.T) {
	webIdentity := func(p *Policy) { p.Issuer = IssuerWebIdentity }
	base := func(p *Policy) { p.BaseRoleARN = "arn:aws:iam::123456789012:role/" }
	noBase := func(p *Policy) { p.BaseRoleARN = "" }
	permits := func(annotations map[string]string) func(*Subject) {
		return func(s *Subject) { s.Namespace = testPolicy(nil).Compile(annotations) }
	}
	absent := func(s *Subject) { s.ServiceAccountAbsent = true }
	const account = "kubectl annotate serviceaccount -n shop cart "
	for _, tt := range []struct {
		name    string
		policy  func(*Policy)
		account map[string]string
		pod     map[string]string
		subject func(*Subject)
		fix     string

		misplaced bool // also where the pod has no annotation
	}{
		{name: "no role", policy: noBase, fix: account + "eks.amazonaws.com/role-arn=arn:aws:iam::ACCOUNT:role/ROLE"},
		{name: "no role with a base", policy: func(p *Policy) { p.BaseRoleARN = "arn:aws:iam::123456789012:role/team" }, fix: account + "eks.amazonaws.com/role-arn=arn:aws:iam::123456789012:role/team/ROLE"},
		{name: "no service account", policy: noBase, subject: absent, fix: "kubectl create serviceaccount -n shop cart && " + account + "eks.amazonaws.com/role-arn=arn:aws:iam::ACCOUNT:role/ROLE"},
		{name: "empty role", policy: noBase, account: withRole(AnnotationRoleARN, ""), fix: account + "eks.amazonaws.com/role-arn=arn:aws:iam::ACCOUNT:role/ROLE --overwrite"},
		{name: "role on the pod", pod: map[string]string{AnnotationRoleARN: testARN}, fix: account + "eks.amazonaws.com/role-arn=" + testARN},
		{name: "kube2iam's role on the pod", pod: map[string]string{AnnotationPodRole: testARN}, fix: account + "eks.amazonaws.com/role-arn=" + testARN},
		{name: "kube2iam's role on the service account", misplaced: true, policy: base, account: map[string]string{AnnotationPodRole: "cart"}, fix: account + "eks.amazonaws.com/role-arn=arn:aws:iam::123456789012:role/cart"},
		{name: "mistyped", misplaced: true, account: map[string]string{"eks.amazonaws.com/role_arn": testARN}, fix: account + "eks.amazonaws.com/role-arn=" + testARN},
		{name: "mistyped on the pod", pod: map[string]string{"iam.amazonaws.com/role-arn": testARN}, fix: account + "eks.amazonaws.com/role-arn=" + testARN},
		{name: "somebody else's", account: map[string]string{"vault.hashicorp.com/role": testARN, "amazonaws.com/queue": "arn:aws:sqs:::x"}, fix: account + "eks.amazonaws.com/role-arn=arn:aws:iam::ACCOUNT:role/ROLE"},
		{name: "quoted", policy: noBase, account: withRole(AnnotationRoleARN, `"`+testARN+`"`), fix: account + "eks.amazonaws.com/role-arn=" + testARN + " --overwrite"},
		{name: "white space", policy: noBase, account: withRole(AnnotationRoleARN, " "+testARN+"\n"), fix: account + "eks.amazonaws.com/role-arn=" + testARN + " --overwrite"},
		{name: "quoted name", policy: base, account: withRole(AnnotationRoleARN, "'cart'"), fix: account + "eks.amazonaws.com/role-arn=arn:aws:iam::123456789012:role/cart --overwrite"},
		{name: "hostile role on the pod", policy: noBase, pod: map[string]string{AnnotationPodRole: "arn:aws:iam::123456789012:role/';id;'/r"}, fix: ""},
		{name: "mirror pod", subject: func(s *Subject) { s.Pod.ServiceAccount = "" }, fix: "static pods cannot have a role: run it as a DaemonSet or Deployment with a service account"},
		{name: "user", policy: noBase, account: withRole(AnnotationRoleARN, "arn:aws:iam::123456789012:user/bob"), fix: account + "eks.amazonaws.com/role-arn=arn:aws:iam::ACCOUNT:role/ROLE --overwrite"},
		{
			name: "one annotation unreadable, the other one kept", account: withRole(),
			subject: permits(map[string]string{AnnotationAllowedRoles: `["arn:aws:iam::123456789012:role/web"]`, AnnotationPermitted: "("}),
			fix: `kubectl annotate namespace shop iam.amazonaws.com/allowed-roles='["arn:aws:iam::123456789012:role/web","` + testARN + `"]' --overwrite && ` +
				`kubectl annotate namespace shop iam.amazonaws.com/permitted='` + testARN + `' --overwrite`,
		},
		{
			name: "neither annotation permits it, one unreadable", account: withRole(),
			subject: permits(map[string]string{AnnotationAllowedRoles: "web", AnnotationPermitted: "arn:x"}),
			fix: `kubectl annotate namespace shop iam.amazonaws.com/allowed-roles='["` + testARN + `"]' --overwrite && ` +
				`kubectl annotate namespace shop iam.amazonaws.com/permitted='arn:x|` + testARN + `' --overwrite`,
		},
		{name: "duration", account: withRole(AnnotationSessionDuration, "1 h"), fix: account + "imdsgate.dev/session-duration=1h --overwrite"},
		{
			name: "audience", policy: webIdentity, account: withRole(AnnotationAudience, "vault"),
			fix: "add it to -audiences, or " + account + "eks.amazonaws.com/audience=sts.amazonaws.com --overwrite",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := testPolicy(tt.policy)
			s := testSubject(p, tt.account, tt.pod)
			if tt.subject != nil {
				tt.subject(&s)
			}
			_, got, _ := p.Authorize(s)
			if got == nil || got.Fix != tt.fix {
				t.Fatalf("fix (-want +got):\n- %s\n+ %+v", tt.fix, got)
			}
			if want := tt.misplaced || tt.pod != nil; got.Misplaced != want {
				t.Errorf("misplaced: %v", got.Misplaced)
			}
			if tt.fix != "" && !strings.HasSuffix(got.Error(), "; fix: "+tt.fix) {
				t.Errorf("error %q", got)
			}
			if _, _, text := status(got); text != got.Error() {
				t.Errorf("the pod is told %q", text)
			}
		})
	}
	long := &Refusal{Text: strings.Repeat("é", maxText), Fix: strings.Repeat("x ", maxFix/2)}
	long.bound()
	checkText(t, long.Error())
	if len(long.Fix) != maxFix {
		t.Errorf("a fix of %d bytes is cut to %d", maxFix, len(long.Fix))
	}
}
