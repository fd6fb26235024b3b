package proxy

import (
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
)

// maxFix bounds a fix, in bytes. A longer one is left out: a command that is cut is worse than none.
const maxFix = 700

// bound keeps a refusal printable and within maxText bytes.
func (r *Refusal) bound() {
	r.Fix = oneLine(r.Fix)
	if len(r.Fix) > maxFix {
		r.Fix = ""
	}
	r.Text = oneLineOf(r.Text, maxText-len(withFix("", r.Fix)))
}

// annotateCommand is a command to paste that sets an annotation: of kind namespace, or of another with its namespace. The
// value may be what the author of a pod wrote, and whoever pastes it may do much: what could mean more to a shell than itself
// is not put into a command, which is empty then.
func annotateCommand(kind, namespace, name, annotation, value string, overwrite bool) string {
	object := kind + " " + name
	if kind != "namespace" {
		object = kind + " -n " + namespace + " " + name
	}
	if !only(name, isObjectNameByte) || !only(namespace, isObjectNameByte) || !only(value, isQuotableByte) || value == "" {
		return ""
	}
	if kind == "namespace" || !only(value, isExternalIDByte) {
		value = "'" + value + "'"
	}
	command := fmt.Sprintf("kubectl annotate %s %s=%s", object, annotation, value)
	if overwrite {
		command += " --overwrite"
	}
	return command
}

// isQuotableByte is of what single quotes keep from a POSIX shell, and a terminal shows as it is.
func isQuotableByte(c byte) bool { return (isGraphic(c) || c == ' ') && c != '\'' }

func isObjectNameByte(c byte) bool { return isLowerDigitDash(c) || c == '.' }

// correct is how to set the annotation right.
func (a annotation) correct(s Subject, value string) string {
	if a.onAccount {
		return annotateCommand("serviceaccount", s.Pod.Namespace, s.Pod.ServiceAccount, a.name, value, a.value != "")
	}
	return "correct it in the template that the pod is made of"
}

// exampleRole is a role's ARN to be completed by who reads it.
func (p *Policy) exampleRole() string {
	if p.BaseRoleARN != "" && only(p.BaseRoleARN, isExternalIDByte) {
		return complete(p.BaseRoleARN, "ROLE")
	}
	return "arn:aws:iam::ACCOUNT:role/ROLE"
}

// noRole refuses a pod that nothing names a role for. The commonest mistake is an annotation in the wrong place.
func (p *Policy) noRole(s Subject, a annotated) *Refusal {
	r := &Refusal{Kind: NoRole, Event: EventNoRole, Text: a.role.on + " has no " + AnnotationRoleARN + " annotation"}
	if s.ServiceAccountAbsent {
		r.Text = a.role.on + " does not exist, so it has no " + AnnotationRoleARN + " annotation"
	}
	role := p.exampleRole()
	if value, why := misplaced(s, a.role.on); value != "" {
		r.Misplaced = true
		r.Text += "; " + why
		if arn, err := completeRole(p.BaseRoleARN, value); err == nil {
			role = arn.String()
		}
	}
	if p.PodAnnotations {
		r.Text += ", and pod " + s.Pod.Namespace + "/" + s.Pod.Name + " has no " + AnnotationPodRole + " annotation"
		if !r.Misplaced {
			r.Text += " (a Deployment's own is not its pods': theirs stand in its spec.template)"
		}
	}
	_, empty := s.ServiceAccountAnnotations[AnnotationRoleARN] // kubectl overwrites nothing unasked, not even an empty value
	r.Fix = annotateCommand("serviceaccount", s.Pod.Namespace, s.Pod.ServiceAccount, AnnotationRoleARN, role, empty)
	if s.ServiceAccountAbsent && r.Fix != "" {
		r.Fix = "kubectl create serviceaccount -n " + s.Pod.Namespace + " " + s.Pod.ServiceAccount + " && " + r.Fix
	}
	return r
}

// misplaced finds an annotation that was meant to name the pod's role, and says why it does not.
func misplaced(s Subject, account string) (value, why string) {
	pod := "pod " + s.Pod.Namespace + "/" + s.Pod.Name
	for _, m := range []struct {
		annotations   map[string]string
		name, on, why string
	}{
		{s.PodAnnotations, AnnotationRoleARN, pod, "has no effect, it belongs on the service account"},
		{s.PodAnnotations, AnnotationPodRole, pod, "counts with -pod-annotations alone"},
		{s.ServiceAccountAnnotations, AnnotationPodRole, account, "has no effect, it is for pods"},
		{s.ServiceAccountAnnotations, mistyped(s.ServiceAccountAnnotations), account, "has no effect, imdsgate reads none of this name"},
		{s.PodAnnotations, mistyped(s.PodAnnotations), pod, "has no effect, imdsgate reads none of this name"},
	} {
		if value = m.annotations[m.name]; value != "" {
			return value, "annotation " + m.name + " of " + m.on + " " + m.why
		}
	}
	return "", ""
}

// mistyped is the name of an annotation that Mistyped tells of; empty: none.
func mistyped(annotations map[string]string) string {
	for _, name := range slices.Sorted(maps.Keys(annotations)) {
		if Mistyped(name, annotations[name]) {
			return name
		}
	}
	return ""
}

// Mistyped says that an annotation is none that counts, but by name and value was probably meant to name a role.
func Mistyped(name, value string) bool {
	return strings.Contains(name, "amazon") && strings.HasPrefix(value, "arn:") && strings.Contains(value, ":role/") && len(value) <= maxARN &&
		name != AnnotationRoleARN && name != AnnotationPodRole
}

// permit is what to do so that the namespace permits the role beside those that it permits now: a command where one can be
// pasted safely.
func (p *Policy) permit(s Subject, role string) string {
	n := s.Namespace
	if n == nil {
		return ""
	}
	if n.advice != "" {
		return n.advice
	}
	type change struct {
		annotation, value string
		there             bool // already
	}
	var changes []change
	glob := func() change {
		value, err := json.Marshal(append(slices.Clip(n.globs), role)) // none are left of a list that cannot be read
		if err != nil || strings.Contains(string(value), `\`) {
			value = nil
		}
		return change{AnnotationAllowedRoles, string(value), n.hasGlobs}
	}
	expression := func() change {
		value := regexp.QuoteMeta(role)
		if n.pattern != nil && n.expression != "" {
			value = n.expression + "|" + value
		}
		return change{AnnotationPermitted, value, n.hasRegexp}
	}
	switch {
	case n.hasGlobs || n.hasRegexp:
		if n.hasGlobs && !slices.ContainsFunc(n.globs, func(glob string) bool { return match(glob, role) }) {
			changes = append(changes, glob())
		}
		if n.hasRegexp && (n.pattern == nil || !n.pattern.MatchString(role)) {
			changes = append(changes, expression())
		}
	case p.NamespacePolicy == NamespacePolicyRegexp:
		changes = []change{expression()}
	default:
		changes = []change{glob()}
	}
	var commands, names []string
	for _, c := range changes {
		names = append(names, c.annotation)
		if only(role, isExternalIDByte) { // else it would mean more in a pattern, or to a shell, than itself
			if command := annotateCommand("namespace", s.Pod.Namespace, s.Pod.Namespace, c.annotation, c.value, c.there); command != "" {
				commands = append(commands, command)
			}
		}
	}
	if command := strings.Join(commands, " && "); len(commands) == len(changes) && len(command) <= maxFix {
		return command
	}
	return "let annotation " + strings.Join(names, " and ") + " of namespace " + s.Pod.Namespace + " permit the role"
}

// FixAmbiguousIP is what to do about two running pods with one IP.
const FixAmbiguousIP = "delete one of the pods that have this IP; if it happens again, the network plugin gives addresses twice"
